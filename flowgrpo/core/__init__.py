"""Pure mathematics, with torch as the only dependency: transitions, solvers, step selections, random
streams, scores and advantages, win rates, GenEval's rule. Nothing here knows diffusers, reads or
writes files, or talks to a network."""
