"""Papermill, but its kernel talks through Unix sockets: python run_notebook.py IN.ipynb OUT.ipynb ...

Jupyter picks the TCP ports of a kernel before the kernel binds them, so that of two kernels which start at once one
may find its port taken and die. A socket has a name of its own. No import of torch, nor of a grammar of Internet
addresses, which takes a second and is there where JupyterLab is installed.
"""

import sys
from uuid import uuid4

sys.modules.setdefault("rfc3987_syntax", None)  # type: ignore[arg-type]  # jsonschema does without it

from papermill.cli import papermill
from papermill.engines import NBClientEngine, papermill_engines
from traitlets.config import Config


def own_sockets() -> Config:
    """The configuration of one Jupyter client, for one kernel. On Linux these sockets are no files."""
    if sys.platform != "linux":
        return Config()
    return Config(KernelManager={"transport": "ipc", "ip": f"@spade-{uuid4().hex}"})


class Engine(NBClientEngine):
    """Papermill's engine with sockets of its own for each notebook."""

    @classmethod
    def execute_managed_notebook(cls, nb_man, kernel_name, **options):
        """As papermill calls it; the options go to the client."""
        return super().execute_managed_notebook(nb_man, kernel_name, config=own_sockets(), **options)


if __name__ == "__main__":
    papermill_engines.register(None, Engine)
    papermill()
