"""GenEval (arXiv 2310.11513): pure rules, the reward built on a detector, and the detector."""
