"""GenEval (Ghosh et al. 2023, arXiv 2310.11513) as a reward, without mmdetection.

`rules` turns detections into verdicts, `detector` finds the objects, `colors` names their colours,
`reward` puts them together.
"""
