"""What diffusers' own pipeline tests ask of a pipeline, asked of one that our engines run.

`classes.py` lists every pipeline class of the installed diffusers that makes video: how a tiny one is made and called.
`variations.py` lists what users do to pipelines and their calls, as data. `cells.py` runs one of each: eagerly, then
with engines, and says how the two compare. `python -m tests.diffusers_suite` prints the table.
"""
