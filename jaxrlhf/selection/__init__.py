"""Selection of completions by their score: best-of-n data for SFT, pairs for DPO, prompts by pass rate.

`select` generates, scores and writes, `rule` decides which completions are kept, `log` stores scored completions on
disk so that an interrupted job can be resumed.
"""
