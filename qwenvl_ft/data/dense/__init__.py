"""Dense captioning: records with objects become grouped JSON answers, a function of (seed, epoch, group) alone."""
