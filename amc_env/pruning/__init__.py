"""What is pruned and how: granularities, criteria, calibration, repair, and the candidate networks."""
