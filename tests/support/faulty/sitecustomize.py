"""Imported by Python at its start where this folder is in PYTHONPATH."""

from tests.support.faulty_rank import install

install()
