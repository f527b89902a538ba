"""Finds, before a training is paid for, what would go wrong without an error message."""

from deepseek_records.doctor.examine import CHECKS, Examination, examine
from deepseek_records.doctor.subject import Finding, NotCheckedError, Subject, open_subject

__all__ = ["CHECKS", "Examination", "Finding", "NotCheckedError", "Subject", "examine", "open_subject"]
