"""The regression gate: a run held against rules, and against a baseline, with three answers.

What is promised, at a stated alpha (default 0.05):

* `fail` is a false alarm with probability at most alpha, all rules of the gate together (Holm 1979).
* `pass` is given to a rule that is broken with probability at most alpha. The gate passes only if all rules pass, so
  nothing needs correcting here (intersection-union test, Berger 1982).
* Everything else is `inconclusive`, with the number of further haystacks that would settle it.

A rule on a drop is a test of non-inferiority: it passes when the whole interval of the drop (confidence 1 - 2 alpha)
lies below the limit, not when no difference was found. Questions that both runs were asked are pairs; questions on one
haystack are one cluster. `laid-eval gate --self-check` shows how far the promises hold, in simulation.
"""
