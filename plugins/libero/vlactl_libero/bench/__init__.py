"""`vlactl bench env` for LIBERO: the stock simulator and vlactl's, in turns, in one run.

`measure` tells the story. Each contender lives in a process of its own (`contender`,
`contender_process`): `lockstep` drives LIBERO's `SubprocVectorEnv`, `slots` drives the environment
as training does. `workload` says what both of them play, `memory` what they weigh, `expected` what
should come out, `progress` how long it takes, `table` how it is shown.
"""
