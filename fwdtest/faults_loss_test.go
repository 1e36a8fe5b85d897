// This file lists faults that show when messages get lost in one direction.

package fwdtest_test

import "github.com/forwardctx/fwd"

// inMesh lets the ranks of a group send messages to each other, with these flaws.
func inMesh(wrong flaws) breakGroup {
	return func(group []fwd.Coordinator) { copy(group, newMesh(len(group), wrong)) }
}

// aMesh begins the names of faults and liberties whose groups are meshes.
const (
	aMesh      = "a mesh "
	aLargeMesh = aMesh + "of up to 8 ranks"
)

// These are what the suite says.
const (
	onSome  = `only some ranks got the votes of step \d+, although step \d+ was broken`
	inARow  = `only one got the votes of step \d+, and only one those of step \d+`
	notHere = `rank \d in step \d+ has not returned after 2s`
)

var lossFaults = []fault{
	{aMesh + "that goes on alone", inMesh(flaws{saysNothing: true}), onSome + "|" + inARow,
		[]string{"Loss/BeforeTheVote", "Loss/AfterFirstVotes", "Loss/Stays", "Loss/HearsNobody"}},
	{aMesh + "that completes every other step", inMesh(flaws{confirmsNever: true}), onSome,
		[]string{"Loss/BeforeTheVote", "Loss/UnheardByAll", "Loss/Stays"}},
	{aMesh + "that confirms what it does not have", inMesh(flaws{confirmsEarly: true}), onSome,
		[]string{"Loss/BeforeTheVote", "Loss/HearsNobody"}},
	{aMesh + "that goes by the majority", inMesh(flaws{majority: true}), onSome + "|" + inARow,
		[]string{"Loss/BeforeTheVote", "Loss/AfterFirstVotes"}},
	{aMesh + "whose third ranks go on without the pair", inMesh(flaws{thirdsGoOn: true}), onSome,
		[]string{"Loss/BeforeTheVote", "Loss/Stays"}},
	{aMesh + "that names the unheard rank to itself", inMesh(flaws{namesItself: true}),
		`error .* names itself`, []string{"Loss/BeforeTheVote", "Loss/UnheardByAll"}},
	{aMesh + "that names all others", inMesh(flaws{namesAll: true}),
		`lost \d to \d.*: error .* has ranks \[.*\], want ranks of \[\d`,
		[]string{"Loss/BeforeTheVote", "Loss/AfterFirstVotes"}},
	{aMesh + "that waits for confirmations for ever", inMesh(flaws{waitsForEver: true}), notHere,
		[]string{"Loss/GiveUpInTurn"}},
	{aMesh + "that never comes together again", inMesh(flaws{shuns: true}),
		`the group is not whole 2 steps after`, []string{"Loss/BeforeTheVote", "Loss/GiveUpInTurn"}},
	{aMesh + "that guesses votes", inMesh(flaws{guesses: true}), `the vote of rank \d has `,
		[]string{"Loss/BeforeTheVote", "Loss/ComesAndGoes"}},
}
