"""A seeded simulation of the whole engine: one seed is one history, to the byte, on any machine.

python -m tests.proof.simulation --seed 7 --trace
"""
