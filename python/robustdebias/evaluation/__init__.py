"""What a model knows and what it prefers: held-out loss by group, StereoSet, CrowS-Pairs.

Every ``evaluate`` returns a dictionary that JSON can hold. Besides the scores it carries the outcome of every item
(for confidence intervals) and a fingerprint of the items: two results may be compared where they agree in it.
"""
