"""Compiles a kernel for a GPU that is not here, and reads what ptxas and the disassembler say."""
