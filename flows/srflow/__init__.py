"""SRFlow: super-resolution as a distribution, and the networks that only it uses.

Lugmayr, Danelljan, Van Gool, Timofte; ECCV 2020, arXiv 2006.14200. In this folder "the paper",
sections and equations refer to it, and "authors' code" refers to the repository andreas128/SRFlow.
"""

from flows.srflow.encoder import RRDB, RRDBEncoder
from flows.srflow.model import SRFlow
from flows.srflow.padding import padded

__all__ = ["RRDB", "RRDBEncoder", "SRFlow", "padded"]
