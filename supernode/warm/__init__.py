"""Warm ClientApps: processes that are forked from one that has imported what they need.

Flower starts a program for every order, and each would import Flower anew, 1 s of a CPU, and to
train or evaluate torch and all the rest, 6 s and 500 MB. Here the SuperNode's SuperExec, which is
there anyway and has Flower, forks instead (``superexec``). What is forked asks the fork server
(``server``), which has the rest, to do the work, and does it itself where none answers. The
SuperNode starts that server with an order to train or evaluate (``orders``), so that a preflight
costs no memory, and it ends after WARM_S idle seconds. The work is Flower's own ClientApp code,
which loads the run's app as ever: what forks has neither seen it nor any row. One that is killed
is missed at once (``lost``).

Who ends with whom (PR_SET_PDEATHSIG): SuperExec and fork server with their SuperNode, what
is forked with who has forked it, the work also with who asked for it.
"""
