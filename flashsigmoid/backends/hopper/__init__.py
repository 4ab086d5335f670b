"""Kernels for Hopper (sm_90) in Gluon, which comes with Triton 3.6 and later.

Under construction: the kernels compile and have not run on a GPU, so nothing selects this backend yet.
"""
