"""Mixed traffic with faults, and what must hold all the while: `python -m loadtests.soak --model FOLDER --minutes 10`.

A server of its own is asked by tenants that read to the end, leave in the middle, read slowly, go beyond their quotas
or ask for what is not theirs. Meanwhile engines are killed, paused and get stuck, the database is stopped, the object
store fails, the disk is full, the clock jumps, keys are replaced, adapters come and go. `faults.py` has the order,
`checks.py` and `leaks.py` the invariants. The last line printed is one JSON document; the exit code is 1 if anything
did not hold.
"""
