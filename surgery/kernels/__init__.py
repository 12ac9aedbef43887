"""The noise contract's arithmetic, twice: numba for the CPU (`cpu`), Triton for the GPU (`gpu`), with the same bits."""
