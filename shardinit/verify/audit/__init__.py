"""Audits: plans compiled by the compilers of chips that are not there."""
