"""What a reward is, how its score counts, the scorer that runs rewards beside the sampler, comparisons of pairs, and rewards on other machines."""
