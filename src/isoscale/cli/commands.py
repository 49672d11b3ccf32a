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

app.command("quickstart")(quickstart)
app.command("init")(init)
app.command("plan")(plan)
app.command("sweep")(sweep)
app.command("transfer")(transfer)
app.command("train")(train)
app.command("eval")(evaluate)
app.command("generate")(generate)
app.command("report")(report)
app.command("doctor")(doctor)
