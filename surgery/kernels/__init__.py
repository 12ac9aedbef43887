"""The arithmetic of the noise, twice: numba on the CPU (`cpu`), Triton on the GPU (`gpu`), with the same bits."""
