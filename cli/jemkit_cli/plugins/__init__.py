"""`jemkit plugins`: lists parts and their options, writes a new plug-in, checks one.

`templates/` holds the files of a new plug-in; `new` fills in what stands behind a $.
"""

import typer

from jemkit_cli.plugins.check import check
from jemkit_cli.plugins.listing import info, list_parts
from jemkit_cli.plugins.new import new

app = typer.Typer(no_args_is_help=True, help="Parts and the plug-ins that provide them.")
app.command("list")(list_parts)
app.command()(info)
app.command()(new)
app.command()(check)
