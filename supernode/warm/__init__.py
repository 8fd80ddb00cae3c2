"""Warm ClientApps: one process of a SuperNode imports the libraries, each order is a fork of it.

Flower starts a program ``flwr-clientapp`` for every order, and each one would import torch and all
the rest anew: 6 s of a CPU and 500 MB. With this package the SuperNode's PATH begins with a small
``flwr-clientapp`` of ours (``program``), which hands the order to the fork server (``server``). The
SuperNode starts that with its first order to train or to evaluate (``orders``), and it ends after
WARM_S idle seconds; a preflight needs none of it. Where no fork server answers, the ordinary
``flwr-clientapp`` runs. What is forked runs Flower's own ClientApp code, which loads the run's app
as ever: the fork server has neither seen it nor any row.

How they end: the fork server with its SuperNode, whatever is forked with the fork server
(PR_SET_PDEATHSIG) or with the program that asked for it, by SIGKILL.
"""
