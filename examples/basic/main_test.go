package main

func Example() {
	main()
	// Output:
	// 6 tokens, sums [6 10 50]
	// fwd: no forward context: attention metadata of layer "pool"
}
