// This file holds the example of the documentation.

package reqtrace_test

import (
	"fmt"
	"strings"

	"github.com/forwardctx/fwd/fwdplan/reqtrace"
)

func ExampleRead() {
	trace, err := reqtrace.Read(strings.NewReader(`Timestamp,Model,Request tokens,Response tokens
5,large,472,18
6.5,large,110,0
7,small,108,12
`))
	if err != nil {
		panic(err)
	}
	fmt.Printf("%s, %d failed\n", trace.Format, trace.Failed)
	for _, row := range trace.Rows {
		fmt.Println(row.Time.Sub(trace.Rows[0].Time), row.ContextTokens, row.GeneratedTokens)
	}
	// Output:
	// BurstGPT, 1 failed
	// 0s 472 18
	// 2s 108 12
}
