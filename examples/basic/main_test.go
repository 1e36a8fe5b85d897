// What the program prints.

package main

func Example() {
	main()
	// Output:
	// 6 tokens, sums [6 10 50]
	// fwd: no forward context: no attention metadata for "pool"
}
