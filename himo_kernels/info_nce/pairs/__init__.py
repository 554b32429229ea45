"""InfoNCE of any pairs: one direction, unequal sides, several positives, exclusions."""
