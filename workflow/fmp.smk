# The second paper: runs, tables and a figure of flexible meta pruning, for configurations with a file in config/fmp/.
#
# Targets: fmp_table_2, fmp_table_3, fmp_table_4, fmp_figure_1, fmp, demo_<network of config/fmp/demo.yaml>
if (HERE / "config" / "fmp" / f"{CONFIG.name}.yaml").is_file():
    from spade.fmp_runs import criteria_runs, load_fmp, method_runs

    FMP = load_fmp(CONFIG.name)
    FMP_RUNS = {run.name: run for run in [*criteria_runs(FMP), *method_runs(FMP)]}
    FMP_REPORTS = {"fmp_table_2": ("csv", "md"), "fmp_table_3": ("csv", "md"), "fmp_table_4": ("csv", "md"), "fmp_figure_1": ("png",)}

    def fmp_parameters(run):
        values = {"method": run.method, "target": run.target, "criterion": run.criterion, "metric": run.metric}
        return as_yaml(values | {"seed": run.seed, "steps": run.steps, "config": CONFIG.name, "out": OUT})

    def fmp_report(name, kind):
        labels = {name.split("_")[1].capitalize(): name.split("_")[2], "file": kind}
        return report(f"{OUT}/{name}.{kind}", caption="report/fmp.rst", category="Second paper", labels=labels)

    # Runs that take longest start first, so that no core waits for one of them at the end.
    FMP_LONGEST = {run.name for run in FMP_RUNS.values() if run.method not in ("unpruned", "l1") and not run.steps}
    for FMP_RULE, FMP_NAMES in (("fmp_longest", FMP_LONGEST), ("fmp_run", set(FMP_RUNS) - FMP_LONGEST)):

        rule:
            name: FMP_RULE
            priority: int(FMP_NAMES is FMP_LONGEST)
            wildcard_constraints:
                fmp="|".join(sorted(FMP_NAMES)) or "none",
            input:
                teacher=lambda w: f"{OUT}/fmp/runs/{FMP_RUNS[w.fmp].teacher.name}/done" if FMP_RUNS[w.fmp].teacher else [],
            output: touch(f"{OUT}/fmp/runs/{{fmp}}/done")
            log: notebook=f"{OUT}/fmp/runs/{{fmp}}/run.ipynb"
            params:
                launcher=ON_GPU,
                notebook="meta_prune",
                parameters=lambda w: fmp_parameters(FMP_RUNS[w.fmp]),
                key=content_key(FMP.model_dump(mode="json")),
            threads: CONFIG.threads
            resources: gpu=GPU
            shell: CALL

    # As for the first paper, the `.done` beside the notebook says that a table was made here: a clone has the tables.
    for FMP_NAME, FMP_KINDS in FMP_REPORTS.items():

        rule:
            name: FMP_NAME
            input: [f"{OUT}/fmp/runs/{run}/done" for run in FMP_RUNS] if FMP_NAME != "fmp_table_2" else []
            output:
                [fmp_report(FMP_NAME, kind) for kind in FMP_KINDS],
                touch(f"{OUT}/notebooks/{FMP_NAME}.done"),
            log: notebook=f"{OUT}/notebooks/{FMP_NAME}.ipynb"
            params:
                launcher=PLAIN,
                notebook=FMP_NAME,
                parameters=as_yaml({"config": CONFIG.name, "out": OUT}),
                key=content_key(FMP.model_dump(mode="json")),
            threads: ALONE if FMP_NAME in ("fmp_table_3", "fmp_table_4") else 1  # they measure time
            shell: CALL

    rule fmp_page:
        input: [f"{OUT}/notebooks/{name}.done" for name in FMP_REPORTS]
        output: touch(f"{OUT}/notebooks/fmp.done")
        params: key=content_key(FMP.model_dump(mode="json"))
        run:
            from spade.fmp_runs import write_fmp_page

            write_fmp_page(FMP, OUT)

    for FMP_TARGET in ("fmp", f"demo_{FMP.network}"):

        rule:
            name: FMP_TARGET
            input: f"{OUT}/notebooks/fmp.done"
