r"""How flows of glasflow, which brings a fork of nflows, are made robust: as nflows' own."""

from ._nflows_migrate import operate_on

__all__: list[str] = []

operate_on("glasflow.nflows")
