# The whole paper as one graph of papermill calls.
#
#   snakemake table_1 --configfile config/demo.yaml                  just what Table 1 needs, on all cores (profiles/default)
#   snakemake all --configfile config/gpu.yaml --cores 16 --resources gpu=2
#   snakemake all --configfile config/gpu.yaml --workflow-profile config/slurm
#
# Targets: table_1 ... table_6, figure_1 ... figure_8, figure_steps, all. `-n` tells what would be done, `--config` changes where:
#   results=folder        instead of outputs/PROFILE
#   acquisitions=folder   of HDF5 files, instead of the profile's
#   partial=true          tables and figures of what is there; no run is made, none again
#
# What a job executed is in its notebook: runs/RUN/run.ipynb, latency/NETWORK.ipynb, notebooks/REPORT.ipynb. These are declared as logs, since Snakemake removes the outputs of
# a job that failed, but keeps its logs. The training state in runs/RUN/state is no output either: a job that was killed goes on from it.
import sys
from pathlib import Path

import yaml

sys.path.insert(0, workflow.basedir)      # spade of this checkout
from snakemake.exceptions import WorkflowError

from spade import workflow as batch
from spade.basics import content_key
from spade.files import resolve
from spade.data.phantom import VERSION
from spade.config import as_plain, load_profile, pick_device

workdir: workflow.basedir

#: what --config may say
SETTINGS = ("results", "acquisitions", "partial")


def read_profile():
    """The profile that --configfile names; refuses other files and unknown settings, which would be ignored."""
    if not workflow.configfiles:
        raise WorkflowError("name a profile, for instance --configfile config/demo.yaml")
    path = Path(workflow.configfiles[-1]).resolve()
    if path.parent != resolve("config").resolve():
        raise WorkflowError(f"{path} is not in {resolve('config')}: put your profile there, since the notebooks look for it by its name")
    written = yaml.safe_load(path.read_text(encoding="utf-8"))
    for name, value in config.items():
        if name in written and value != written[name]:
            raise WorkflowError(f"--config cannot change {name!r} of a profile, which the notebooks read themselves: change {path.name}, or a copy of it in {path.parent}")
        if name not in SETTINGS and name not in written:
            raise WorkflowError(f"unknown setting {name!r} in --config: choose one of {', '.join(SETTINGS)}")
    if str(config.get("partial", False)).lower() not in ("true", "false"):
        raise WorkflowError(f"--config partial is {config['partial']!r}, expected true or false")
    try:
        return load_profile(path.stem)
    except ValueError as error:
        raise WorkflowError(str(error)) from None


PROFILE = read_profile()
OUT = batch.relative(resolve(config.get("results", f"outputs/{PROFILE.name}")))
DATA = config.get("acquisitions", "")
PARTIAL = str(config.get("partial", False)).lower() == "true"
RUNS, REPORTS = batch.paper_runs(PROFILE), batch.paper_reports(PROFILE)
MADE = batch.read_runs(OUT)               # tells what memory and time to reserve
GPU = {"gpu": 1} if batch.uses_gpu(PROFILE) else {}
PYTHON = f"{sys.executable} -m spade.workflow"
CALL = f"{sys.executable} -m spade.jobs --notebook {{params.notebook}} --output {{log.notebook:q}} --threads {{params.threads}} --gpus {{params.gpus}} --parameters {{params.parameters:q}}"

CORES = workflow.resource_settings.cores or 0         # none on a cluster


def places():
    """How many jobs run side by side; None where nobody has said."""
    if GPU:
        return workflow.resource_settings.resources.get("gpu") or None
    return max(1, CORES // PROFILE.threads) if CORES else None


if workflow.is_main_process:
    TARGETS = [word for word in sys.argv[1:] if word in REPORTS]      # Snakemake tells a Snakefile its targets too late
    print(batch.tell_plan(PROFILE, resolve(OUT), data=DATA, targets=() if "all" in sys.argv else TARGETS, places=places()), file=sys.stderr)


onstart:
    # Now, and not in job after job when data were simulated for an hour.
    if not workflow.non_local_exec and any(job.rule.resources.get("gpu") for job in workflow.dag.needrun_jobs()):
        try:
            pick_device(PROFILE.device)
        except ValueError as error:
            raise WorkflowError(str(error)) from None
    # With its limit of jobs a second, Snakemake's scheduler looks once a second more often for each job that has ended; after a hundred that takes a tenth of a core. Another limit of the user's stays.
    limit = workflow.scheduler.job_rate_limiter
    if limit and (limit.max_jobs, limit.timespan) == (100, 1):
        workflow.scheduler.job_rate_limiter = None


# Files whose times tell whether a result is of today's settings and code; written now, since Snakemake soon notes what is there.
MARKS = {} if PARTIAL else {
    **{name: batch.relative(batch.run_settings(run, PROFILE, resolve(OUT), "" if run.super_resolution else DATA)) for name, run in RUNS.items()},
    **{network: batch.relative(batch.latency_settings(network, PROFILE, resolve(OUT))) for network in PROFILE.networks},
}

wildcard_constraints:
    run=r"[\w.-]+",
    network="|".join(PROFILE.networks),
    acceleration=r"\d+",


# Time is measured while nothing else runs: on one machine the job takes all cores, on a cluster a node.
ALL_CORES = max(PROFILE.latency.threads, CORES)
ALONE = {"mem_mb": 16000, "runtime": 60, "slurm_extra": "--exclusive", **GPU}


def job_of(name):
    """The papermill call of a run. For super-resolution, `data` would be a folder of photographs."""
    run = RUNS[name]
    return batch.job_of(run, PROFILE, resolve(OUT), "" if run.super_resolution else DATA, "" if run.strategy else batch.ready_teacher(run, PROFILE))


def maps_of(name):
    """The mark that a run's acquisitions and coil maps are there."""
    return [] if RUNS[name].super_resolution else [f"{OUT}/data/R{RUNS[name].acceleration}.json"]


rule all:
    input:
        [f"{OUT}/{name}" for report in REPORTS.values() for name in report.files],
        f"{OUT}/index.md",


if not PARTIAL:

    # Simulate once, then estimate the coil maps of each acceleration. Both keep what is there already.
    rule acquisitions:
        output: f"{OUT}/data/R0.json"
        params: data=DATA, key=content_key(as_plain(PROFILE.data), VERSION)
        threads: PROFILE.threads
        resources: mem_mb=4000, runtime=120
        benchmark: f"{OUT}/benchmarks/acquisitions/acquisitions.tsv"
        shell: f"{PYTHON} data --profile {PROFILE.name} --acceleration 0 --data={{params.data:q}} --output {{output:q}}"


    rule maps:
        input: f"{OUT}/data/R0.json"
        output: f"{OUT}/data/R{{acceleration,[1-9]\\d*}}.json"
        params: data=DATA, key=content_key(as_plain(PROFILE.sampling), PROFILE.data.seed if PROFILE.data else 0)
        threads: PROFILE.threads
        resources: mem_mb=4000, runtime=240
        benchmark: f"{OUT}/benchmarks/maps/R{{acceleration}}.tsv"
        shell: f"{PYTHON} data --profile {PROFILE.name} --acceleration {{wildcards.acceleration}} --data={{params.data:q}} --output {{output:q}}"


    # A run has four files that others read; the weights of a teacher come before its students.
    for RULE, NAMES in (("pretrain", r"[\w.-]+-teacher-seed\d+"), ("finetune", r"[\w.-]+-(?:supervised|school)(?:-random)?-seed\d+")):
        rule:
            name: RULE
            wildcard_constraints: run=NAMES
            input:
                settings=lambda wildcards: MARKS[wildcards.run],
                maps=lambda wildcards: maps_of(wildcards.run),
                teacher=lambda wildcards: [f"{OUT}/runs/{RUNS[wildcards.run].teacher.name}/network.safetensors"] if RUNS[wildcards.run].strategy else [],
            output: [f"{OUT}/runs/{{run}}/{name}" for name in ("result.json", "network.safetensors", "metrics.csv", "images.npz")]
            log: notebook=f"{OUT}/runs/{{run}}/run.ipynb"
            benchmark: f"{OUT}/benchmarks/{RULE}/{{run}}.tsv"
            params:
                notebook=RULE,
                parameters=lambda wildcards: yaml.safe_dump(job_of(wildcards.run).parameters, default_flow_style=True, width=10**6).strip(),
                threads=PROFILE.threads,
                gpus=len(GPU),
            threads: PROFILE.threads
            resources:
                mem_mb=lambda wildcards: batch.memory_mb(RUNS[wildcards.run], PROFILE, MADE),
                runtime=lambda wildcards: batch.minutes_to_reserve(RUNS[wildcards.run], PROFILE, MADE),
                **GPU,
            shell: CALL


    rule latency:
        input: lambda wildcards: MARKS[wildcards.network]
        output: f"{OUT}/latency/{{network}}.json"
        log: notebook=f"{OUT}/latency/{{network}}.ipynb"
        benchmark: f"{OUT}/benchmarks/latency/{{network}}.tsv"
        params:
            notebook="latency",
            parameters=lambda wildcards: yaml.safe_dump(batch.latency_job(wildcards.network, PROFILE, resolve(OUT)).parameters, default_flow_style=True, width=10**6).strip(),
            threads=PROFILE.latency.threads,
            gpus=len(GPU),
            key=lambda wildcards: content_key(as_plain(PROFILE.latency), list(PROFILE.ratios), as_plain(PROFILE.networks[wildcards.network])["arguments"], batch.known_code_key("latency")),
        threads: ALL_CORES
        resources: **ALONE
        shell: CALL


def needed(report):
    """The files that a report reads, and the weights of its runs, without which a clone's results would pass for made; with partial=true, those of them that are there."""
    reads = report.reads if PARTIAL else sorted({*report.reads, "network.safetensors"})
    paths = [f"{OUT}/runs/{run.name}/{name}" for run in report.runs for name in reads] + [f"{OUT}/latency/{network}.json" for network in report.timed]
    return [path for path in paths if not PARTIAL or resolve(path).is_file()]


def is_finished(report):
    """Whether partial=true must leave a figure as it is: it is there, and the weights or pictures that it was drawn from are not. Snakemake would remove it first."""
    drawn_from = [run for run in report.runs if bool(run.strategy) == (report.name == "figure_2")]      # students' weights, or the teacher's picture
    return set(report.reads) != {"result.json"} and all(resolve(f"{OUT}/{name}").is_file() for name in report.files) and not any(
        all((run.folder(OUT) / name).is_file() for name in report.reads) for run in drawn_from)


if PARTIAL:
    FINISHED = [name for name, report in REPORTS.items() if is_finished(report)]
    REPORTS = {name: report for name, report in REPORTS.items() if name not in FINISHED}
    if FINISHED and workflow.is_main_process:
        print(f"{', '.join(FINISHED)} of {OUT} stays: what it was drawn from is not there", file=sys.stderr)


#: Figure 2 lets the networks reconstruct, and notes the time of each iteration
MEASURING = () if PARTIAL else ("figure_2",)

for REPORT in REPORTS.values():
    rule:
        name: REPORT.name
        input: needed(REPORT)
        output: [f"{OUT}/{name}" for name in REPORT.files]
        log: notebook=f"{OUT}/notebooks/{REPORT.name}.ipynb"
        benchmark: f"{OUT}/benchmarks/report/{REPORT.name}.tsv"
        params:
            notebook=REPORT.name,
            parameters=yaml.safe_dump({**REPORT.parameters, **({"data": DATA} if REPORT.name == "figure_2" else {}), "profile": PROFILE.name, "out": OUT}, default_flow_style=True, width=10**6).strip(),
            threads=1,
            gpus=len(GPU) if REPORT.name in MEASURING else 0,
            key=batch.report_key(REPORT),
        threads: ALL_CORES if REPORT.name in MEASURING else 1
        resources: **(ALONE if REPORT.name in MEASURING else {"mem_mb": 2000, "runtime": 30})
        shell: CALL


# The page that shows them all; --keep-going leaves it out when one of them failed: then `python -m spade.workflow index --profile PROFILE` makes it of what is there.
rule index:
    input: [f"{OUT}/{name}" for report in REPORTS.values() for name in report.files]
    output: f"{OUT}/index.md", f"{OUT}/resources.md", f"{OUT}/resources.csv"
    params: key=content_key([batch.report_key(report) for report in REPORTS.values()])
    resources: mem_mb=2000, runtime=10
    shell: f"{PYTHON} index --profile {PROFILE.name} --out {{OUT:q}}"
