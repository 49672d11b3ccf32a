"""Registers every command, in the order in which a newcomer meets them."""

from isoscale.cli.app import app
from isoscale.cli.doctor import doctor
from isoscale.cli.evaluate import evaluate
from isoscale.cli.generate import generate
from isoscale.cli.init import init
from isoscale.cli.plan import plan
from isoscale.cli.quickstart import quickstart
from isoscale.cli.report import report
from isoscale.cli.sweep import sweep
from isoscale.cli.train import train
from isoscale.cli.transfer import transfer

for _name, _command in {
    "quickstart": quickstart, "init": init, "plan": plan, "sweep": sweep, "transfer": transfer, "train": train,
    "eval": evaluate, "generate": generate, "report": report, "doctor": doctor,
}.items():  # fmt: skip
    app.command(_name)(_command)
