"""`effc bench`: effc beside other ways to run the same model on the same machine.

`suites` says what is timed and `peers` by whom; `session` runs each case in a process of its own,
where `worker` times all ways in turns; `archive` keeps what was found, and `tables` and `plots`
show it. `limits` measures what the machine can do at most. Figures are ratios of medians taken in
one run, with their spread; seconds of different runs are not compared.
"""
