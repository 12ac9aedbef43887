"""The arithmetic of the noise, three times: NumPy (`plain`), C on the CPU (`native`), Triton (`gpu`); the same bits."""
