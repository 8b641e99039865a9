"""The 19 data sets of FLARE25's 2D multimodal task: what they are, how they become records, how answers are scored."""
