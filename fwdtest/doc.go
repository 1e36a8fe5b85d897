// Package fwdtest tests implementations of [fwd.Coordinator], as testing/slogtest tests those of
// slog.Handler. It runs in real time and looks at coordinators only from outside, so it serves
// those of one process and those that speak over a network.
//
// An implementation calls [TestCoordinator] in a test of its own, with a function that makes
// groups:
//
//	func TestCoordinator(t *testing.T) {
//		server := startServer(t)
//		fwdtest.TestCoordinator(t, func(t *testing.T, size int) []fwd.Coordinator {
//			name := newGroupName() // groups share the server
//			group := make([]fwd.Coordinator, size)
//			var wg sync.WaitGroup
//			for rank := range group {
//				wg.Go(func() { // Join waits for the other ranks
//					c, err := Join(t.Context(), server.URL, name, rank, size)
//					if err != nil {
//						t.Errorf("rank %d: %v", rank, err)
//						return
//					}
//					t.Cleanup(func() { c.Close() })
//					group[rank] = c
//				})
//			}
//			if wg.Wait(); t.Failed() {
//				t.FailNow()
//			}
//			return group
//		})
//	}
//
// Options let it check more: what happens when messages get lost in one direction, and groups of other
// sizes.
//
//	fwdtest.TestCoordinator(t, newGroup,
//		fwdtest.WithLoss(func(t *testing.T, group []fwd.Coordinator, from, to int) (end func()) {
//			way := network.Way(group[from], group[to]) // of the test
//			way.Block()
//			return way.Open
//		}),
//		fwdtest.WithSizes(2, 3, 8, 32), // all checks
//		fwdtest.WithSmoke(128))         // a few
//
// # What is checked
//
//   - Exchange: each coordinator knows its rank and size. Every rank gets all votes, in rank order
//     and with every field, in whatever order the ranks come, and nobody returns before the last
//     has come. Votes that were returned never change. The suite does not write to them, so ranks
//     may share them.
//   - Lockstep: if the ranks vote for different steps, all get a [fwd.RankError] that is
//     [fwd.ErrLockstep], with the highest step and the ranks that are not at it. The next step
//     works, whichever rank was restarted, and however often. If all ranks begin anew, or all are
//     further on, they agree at the step that they say.
//   - Missing: if a rank's context ends, all that wait immediately get a RankError that is
//     [fwd.ErrRankMissing], with the group's step and the ranks that had not come. Only for that
//     rank does it wrap the cause. The next step works. A rank that comes late, by one broken step
//     or by several, votes at the group's step, without an error. A rank that is late and was also
//     restarted is out of step.
//   - MissingRanks: a coordinator may have a method Missing() []int. It returns exactly the ranks
//     whose votes the open exchange waits for, and nil if none is open. It answers at any time,
//     from any goroutine. These checks are skipped if there is no such method.
//   - Last: a coordinator may have a method Last() int. It returns the rank whose vote came last in
//     the latest exchange of its rank that has ended, also if the ranks were out of step in it, and
//     -1 if that exchange was broken or if there was none yet. It answers at any time, from any
//     goroutine. These checks are skipped if there is no such method.
//   - Context: a context that has ended before its exchange begins breaks the round; if its rank is
//     the last to come, the round may also be complete. One that ends after its exchange has
//     returned disturbs nobody.
//   - Refused: a vote that [fwd.Vote.Validate] refuses is [fwd.ErrInvalid], and nothing is sent. A
//     second call in one step is ErrLockstep: while the first one waits, and after its round, which
//     was complete or broken. Neither disturbs the round.
//   - Runners: a [fwd.Runner] on each coordinator keeps in step by itself through all of that.
//   - Plans: Runners agree over the coordinator. What each schedules comes to all, its Note too.
//     Idle ranks hold nobody up, and all ranks know when all are idle. If one rank is configured
//     differently, or does not warm up what the others warm up, all get an error that names it, and
//     the next step works. They warm up together and then serve. [fwd.Runner.Begin] votes for
//     several ranks in one goroutine.
//   - Loss: messages of one rank do not come to another, to none of the others, or one rank hears
//     nobody. That begins before anybody votes, after the first vote of a step, or while ranks take
//     steps as they like. It ends after one step or several, stays, or comes and goes. [WithLoss] says
//     what must hold. These checks need that option, and 3 ranks.
//   - Load: many steps, of ranks that come as fast as they can or when they like; several groups
//     concurrently, which don't mix; and contexts that end at any time. An exchange may then
//     succeed on one rank and fail on another, but ranks that get the votes of a step get the same
//     ones, and the group comes together when all is calm.
//   - NothingLeft: rounds, broken rounds and closed groups leave neither goroutines nor memory
//     behind.
//
// # Time
//
// Nobody can see from outside whether a vote has come to the other ranks. The suite measures how
// long a round takes, and waits a good deal longer if the order of arrival matters. Immediately
// means within 2 seconds. An exchange that does not return fails its check after 10 seconds at
// most, and is left behind.
//
// The suite takes about 10 seconds for the coordinators of [fwd.NewLocalGroup], and 40 in groups of 2, 3,
// 8 and 32 ranks with a few of 128; most of that is waiting.
package fwdtest
