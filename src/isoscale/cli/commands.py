"""Registers every command, in the order in which a newcomer meets them."""

from isoscale.cli.app import app
from isoscale.cli.check import check
from isoscale.cli.doctor import doctor
from isoscale.cli.evaluate import evaluate
from isoscale.cli.formats import app as formats_app
from isoscale.cli.generate import generate
from isoscale.cli.init import init
from isoscale.cli.plan import plan
from isoscale.cli.quickstart import quickstart
from isoscale.cli.report import report
from isoscale.cli.scalify import scalify
from isoscale.cli.sweep import sweep
from isoscale.cli.train import train
from isoscale.cli.transfer import transfer

app.command("quickstart", short_help="The whole job: tune, transfer, train in FP8, compare.")(quickstart)
app.command("init", short_help="Write a commented config file.")(init)
app.command("plan", short_help="Print what every tensor gets, and why.")(plan)
app.command("sweep", short_help="Search hyperparameters on the proxy.")(sweep)
app.command("transfer", short_help="Carry a sweep's winner to a bigger model.")(transfer)
app.command("train", short_help="Train one model.")(train)
app.command("eval", short_help="Evaluate a run's newest checkpoint.")(evaluate)
app.command("generate", short_help="Sample text from a run.")(generate)
app.command("report", short_help="Write one static HTML page about a folder.")(report)
app.command("check", short_help="Does this model transfer?")(check)
app.command("scalify", short_help="What scales predict for a model, and what is measured.")(scalify)
app.add_typer(formats_app, name="formats", short_help="Number formats: list, show, measure on a file.")
app.command("doctor", short_help="Say what this machine can do.")(doctor)
