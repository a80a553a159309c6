"""Laws over permutations, relaxed and hard, with their constraints and divergences."""
