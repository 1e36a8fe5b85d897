// What the program prints.

package main

func Example() {
	main()
	// Output:
	// 6 tokens, sums [6 10 50]
	// outside of a pass the layer finds no metadata, as it should
}
