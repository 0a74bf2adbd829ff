//! The product on a real Kubernetes: installed, used, scaled, changed, broken and removed, in this order, in one cluster.
//!
//! Needs a cluster of three nodes with our images loaded; `tests/run cluster` starts one and runs this inside its
//! network. Without it nothing is checked, and it says so. Arguments choose scenarios by a part of their name; those
//! that set the stage always run.

mod ask;
mod cluster;
mod scenario;
mod stream;

use std::time::Instant;

use cluster::Cluster;
use futures::future::LocalBoxFuture;

type Scenario = for<'a> fn(&'a Cluster) -> LocalBoxFuture<'a, anyhow::Result<()>>;

macro_rules! scenarios {
    ($($module:ident: $($name:ident),+;)+) => {
        [$($((stringify!($name), (|cluster| Box::pin(scenario::$module::$name(cluster))) as Scenario)),+),+]
    };
}

#[tokio::main]
async fn main() {
    let scenarios = scenarios! {
        install: surroundings_run, helm_installs_and_its_test_passes;
        serve: five_lines_answer_within_a_minute, the_openai_client_is_served, grpcurl_is_served,
            four_shards_share_the_experts_on_three_nodes, bad_requests_get_a_clear_answer;
        fault: a_killed_worker_comes_back_alone, nothing_changes_when_nothing_changed,
            requests_go_on_without_an_operator, clients_that_leave_leave_nothing_behind;
        refuse: bad_yaml_is_refused_and_the_model_serves_on, what_is_missing_is_named,
            a_quota_that_refuses_pods_is_shown, a_claim_of_one_node_is_refused_to_many_workers;
        scale: the_scale_subresource_works, load_brings_replicas_and_quiet_takes_them;
        change: a_rollout_loses_no_request, changes_under_load_cost_no_request,
            deletion_leaves_nothing_in_any_phase;
        survive: a_node_that_is_cut_off_costs_no_stream, a_node_that_dies_costs_no_stream;
        observe: one_trace_has_router_worker_and_experts, no_text_is_in_the_telemetry;
        install: the_operator_used_its_rights_and_no_others, uninstall_keeps_what_users_declared;
    };
    let Some(cluster) = Cluster::from_environment() else {
        eprintln!("SKIPPED: no cluster here; `tests/run cluster` starts one and runs this");
        return;
    };
    let chosen: Vec<String> = std::env::args().skip(1).filter(|argument| !argument.starts_with('-')).collect();
    let stage = |name: &str| matches!(name, "surroundings_run" | "helm_installs_and_its_test_passes");
    let (mut passed, mut failed) = (0, 0);
    for (name, scenario) in scenarios {
        if !chosen.is_empty() && !stage(name) && !chosen.iter().any(|part| name.contains(part.as_str())) {
            continue;
        }
        let begun = Instant::now();
        let result = scenario(&cluster).await;
        let seconds = begun.elapsed().as_secs_f32();
        match result {
            Ok(()) => {
                passed += 1;
                println!("test {name} ... ok ({seconds:.1} s)");
            }
            Err(error) => {
                failed += 1;
                println!("test {name} ... FAILED ({seconds:.1} s)\n{error:#}\n{}", cluster.state().await);
                if stage(name) {
                    break;
                }
            }
        }
    }
    println!("{passed} passed, {failed} failed");
    std::process::exit(i32::from(failed > 0));
}
