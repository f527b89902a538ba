"""Run programs that a model has written."""

from deepseek_eval.sandbox.client import ProgramResult, describe_protection, run_program, run_programs, run_tests

__all__ = ["ProgramResult", "describe_protection", "run_program", "run_programs", "run_tests"]
