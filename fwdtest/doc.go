// Package fwdtest checks implementations of [fwd.Coordinator], as testing/slogtest checks those of slog.Handler. It runs in
// real time and looks at coordinators from outside only, so that it serves those of one process and those that speak over a
// network alike.
//
// An implementation calls [TestCoordinator] in a test of its own, with a function that makes groups:
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
// # What is checked
//
//   - Exchange: each coordinator knows its rank and size. All votes come to all ranks, in rank order and with every field,
//     whatever the order in which the ranks come, and nobody returns before the last has come. The votes are the caller's.
//   - Lockstep: ranks at different steps all get a [fwd.RankError] that is [fwd.ErrLockstep], with the highest step and the
//     ranks which are not at it. The next step works, whichever rank was restarted, and how often. Ranks that all begin anew,
//     or are all further on, agree at the step that they say.
//   - Missing: where a rank's context ends, by itself or with a cause, all that wait get a RankError that is
//     [fwd.ErrRankMissing] at once, with the group's step and the ranks which had not come. For that rank alone it wraps the
//     cause. The next step works, and a rank that comes late, by one broken step or by several, votes at the group's
//     step, without an error. A rank that is late and was restarted is out of step.
//   - Context: one that has ended before its exchange begins breaks the round, or doesn't where the rank is the last to come
//     and need not wait. One that ends after its exchange has returned disturbs nobody.
//   - Refused: votes that can't be right are [fwd.ErrInvalid], and nothing is sent. A second call in one step is ErrLockstep:
//     while the first one waits, and after its round, which was complete or broken. Neither disturbs the round.
//   - Runners: a [fwd.Runner] on each coordinator keeps in step by itself through all of that.
//   - Load: many steps, back to back and of ranks that come when they like; several groups at once, which don't mix; and
//     contexts that end at any time. There an exchange may succeed on one rank and fail on another whose context ended
//     meanwhile, but ranks that get the votes of a step get the same ones, and when all is calm the group comes together.
//   - NothingLeft: neither goroutines nor memory are left by rounds, broken rounds, and groups that were closed.
//
// # Time
//
// Whether a vote has come to the other ranks can't be seen from outside. The suite measures how long a round takes, and where
// the order of arrival matters it waits a good deal longer. "At once" is within 2 seconds. An exchange that doesn't return
// fails its check after 10 seconds at most, and is left behind.
//
// It takes about 6 seconds for the coordinators of [fwd.NewLocalGroup], most of which it waits.
package fwdtest
