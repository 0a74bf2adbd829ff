//! The chart: it lints, takes only values that exist, and what it renders keeps our rules with every way of setting it.
//!
//! Needs helm; `tests/run` provides it and names it in HELM. Without it the tests say so and check nothing.

use std::{collections::BTreeSet, fs, process::Command};

use serde_yaml::Value;

/// Ways to set the chart, as `--set` and `--set-json` arguments; each has to lint and to keep every rule.
const SETTINGS: [(&str, &[&str]); 14] = [
    ("defaults", &[]),
    ("one namespace", &["watchNamespaces={team-a}"]),
    ("two namespaces", &["watchNamespaces={team-a,team-b}"]),
    ("own registry", &["image.registry=registry.example:5000", "image.repository=mirror/modelfleet", "image.tag=edge"]),
    ("no registry", &["image.registry=", "image.pullPolicy=Never"]),
    ("digest", &["image.digest=sha256:0000000000000000000000000000000000000000000000000000000000000000"]),
    ("pull secrets", &["imagePullSecrets[0].name=one", "imagePullSecrets[1].name=two"]),
    (
        "own hub",
        &[
            "hub.endpoint=https://hub.example",
            "hub.caBundle=-----BEGIN CERTIFICATE-----\nAA==\n-----END CERTIFICATE-----\n",
            "hub.proxy=http://proxy.example:3128",
            "hub.noProxy=.svc\\,10.0.0.0/8",
        ],
    ),
    ("telemetry", &["telemetry.endpoint=http://collector.example:4318", "telemetry.protocol=http/protobuf"]),
    ("load balancer", &["router.service.type=LoadBalancer", "router.service.annotations.example\\.com/internal=yes"]),
    ("one of each", &["router.replicas=1", "operator.replicas=1"]),
    (
        "placed",
        &[
            "router.nodeSelector.pool=front",
            "router.tolerations[0].key=front",
            "router.tolerations[0].operator=Exists",
            "operator.priorityClassName=system-cluster-critical",
            "operator.podAnnotations.example\\.com/team=a",
            "router.podAnnotations.example\\.com/team=a",
        ],
    ),
    (
        "ingress",
        &[
            "ingress.enabled=true",
            "ingress.host=models.example",
            "ingress.className=nginx",
            "ingress.tlsSecretName=tls",
        ],
    ),
    (
        "gateway and monitor",
        &[
            "httpRoute.enabled=true",
            "httpRoute.parentRefs[0].name=gateway",
            "httpRoute.hostnames={models.example}",
            "podMonitor.enabled=true",
            "podMonitor.labels.release=prometheus",
        ],
    ),
];

/// Settings that the schema refuses, and the value that its words name.
const REFUSED: [(&str, &str); 15] = [
    ("router.replica=3", "router"),
    ("nonsense=1", "nonsense"),
    ("router.replicas=0", "replicas"),
    ("operator.replicas=two", "replicas"),
    ("router.service.type=ExternalName", "type"),
    ("image.digest=sha256:abc", "digest"),
    ("image.pullPolicy=Sometimes", "pullPolicy"),
    ("image.repository=", "repository"),
    ("watchNamespaces={Team_A}", "watchNamespaces"),
    ("hub.endpoint=huggingface.co", "endpoint"),
    ("hub.token=secret", "token"),
    ("telemetry.protocol=http/json", "protocol"),
    ("hub.caBundle=nonsense", "caBundle"),
    ("router.resources.limits=null", "limits"),
    ("httpRoute.enabled=true", "parentRefs"),
];

/// What the operator may do, one line a rule.
const RIGHTS: [&str; 11] = [
    "apps/statefulsets: create delete get list patch watch",
    "batch/jobs: create delete get list patch watch",
    "/configmaps: create delete get list patch watch",
    "/events: list watch",
    "/persistentvolumeclaims: get",
    "/pods: delete list watch",
    "/pods/status: patch",
    "/serviceaccounts: create get list patch watch",
    "/services: create get list patch watch",
    "modelfleet.io/modeldeployments: list watch",
    "modelfleet.io/modeldeployments/status: patch",
];

fn helm(arguments: &[&str]) -> Option<Result<String, String>> {
    let Some(helm) = std::env::var_os("HELM") else {
        eprintln!("SKIPPED: HELM names no helm; `tests/run chart` builds one and runs this");
        return None;
    };
    let output = Command::new(helm).args(arguments).current_dir(tests::root()).output().expect("helm runs");
    let text = |bytes| String::from_utf8(bytes).expect("UTF-8");
    Some(if output.status.success() { Ok(text(output.stdout)) } else { Err(text(output.stderr)) })
}

/// `helm COMMAND charts/modelfleet --set ..`
fn with_settings(command: &[&str], settings: &[&str]) -> Option<Result<String, String>> {
    let mut arguments = command.to_vec();
    for setting in settings {
        arguments.extend(["--set", setting]);
    }
    helm(&arguments)
}

const LINT: [&str; 5] = ["lint", "charts/modelfleet", "--strict", "--kube-version", "1.33.0"];
const TEMPLATE: [&str; 7] =
    ["template", "modelfleet", "charts/modelfleet", "--namespace", "modelfleet-system", "--kube-version", "1.33.0"];

fn rendered(settings: &[&str]) -> Option<Vec<Value>> {
    let text = with_settings(&TEMPLATE, settings)?.unwrap_or_else(|error| panic!("{settings:?}: {error}"));
    Some(objects(&text))
}

fn objects(text: &str) -> Vec<Value> {
    let documents = serde_yaml::Deserializer::from_str(text);
    let values = documents.map(|document| serde::Deserialize::deserialize(document).expect("YAML"));
    values.filter(|value: &Value| !value.is_null()).collect()
}

/// The text at a path of keys, `""` if there is none.
fn text<'a>(value: &'a Value, path: &[&str]) -> &'a str {
    at(value, path).as_str().unwrap_or("")
}

fn at<'a>(value: &'a Value, path: &[&str]) -> &'a Value {
    path.iter().fold(value, |value, key| value.get(*key).unwrap_or(&Value::Null))
}

fn of_kind<'a>(objects: &'a [Value], kind: &'a str) -> impl Iterator<Item = &'a Value> {
    objects.iter().filter(move |object| text(object, &["kind"]) == kind)
}

/// The pod specs of everything that runs.
fn pods(objects: &[Value]) -> Vec<&Value> {
    let templates = of_kind(objects, "Deployment").map(|object| at(object, &["spec", "template", "spec"]));
    templates.chain(of_kind(objects, "Pod").map(|object| at(object, &["spec"]))).collect()
}

fn containers(pod: &Value) -> impl Iterator<Item = &Value> {
    let lists = ["initContainers", "containers"].into_iter().filter_map(|key| at(pod, &[key]).as_sequence());
    lists.flatten()
}

fn strings(value: &Value) -> Vec<String> {
    let list = value.as_sequence().map_or(&[][..], Vec::as_slice);
    list.iter().map(|item| item.as_str().expect("a string").to_owned()).collect()
}

/// `GROUP/RESOURCE: VERBS` of each rule, sorted.
fn rights(role: &Value) -> BTreeSet<String> {
    let mut rights = BTreeSet::new();
    for rule in at(role, &["rules"]).as_sequence().expect("rules") {
        let mut verbs = strings(at(rule, &["verbs"]));
        verbs.sort();
        for group in strings(at(rule, &["apiGroups"])) {
            for resource in strings(at(rule, &["resources"])) {
                rights.insert(format!("{group}/{resource}: {}", verbs.join(" ")));
            }
        }
    }
    rights
}

#[test]
fn lints_with_every_setting() {
    for (name, settings) in SETTINGS {
        let Some(result) = with_settings(&LINT, settings) else {
            return;
        };
        assert!(result.is_ok(), "{name}: {result:?}");
    }
}

#[test]
fn values_that_do_not_exist_are_refused() {
    for (setting, named) in REFUSED {
        let Some(result) = with_settings(&TEMPLATE, &[setting]) else {
            return;
        };
        let error = result.expect_err(setting);
        assert!(error.contains("values don't meet the specifications of the schema"), "{setting}: {error}");
        assert!(error.contains(named), "{setting}: {error}");
    }
}

#[test]
fn every_value_is_in_the_schema() {
    fn compare(path: &str, value: &Value, schema: &Value) {
        let Some(properties) = schema.get("properties") else {
            return;
        };
        let Some(map) = value.as_mapping() else {
            return;
        };
        assert_eq!(schema.get("additionalProperties"), Some(&Value::Bool(false)), "{path} is closed");
        for (key, value) in map {
            let key = key.as_str().expect("a name");
            let inner = properties.get(key).unwrap_or_else(|| panic!("{path}.{key} is not in the schema"));
            compare(&format!("{path}.{key}"), value, inner);
        }
    }
    let chart = tests::root().join("charts/modelfleet");
    let read = |name: &str| fs::read_to_string(chart.join(name)).expect(name);
    let values = serde_yaml::from_str(&read("values.yaml")).expect("YAML");
    let schema: Value = serde_yaml::from_str(&read("values.schema.json")).expect("JSON");
    compare("", &values, &schema);
}

#[test]
fn every_container_is_bounded_and_restricted() {
    for (name, settings) in SETTINGS {
        let Some(objects) = rendered(settings) else {
            return;
        };
        assert!(pods(&objects).len() >= 2, "{name}");
        for pod in pods(&objects) {
            assert_eq!(at(pod, &["securityContext", "runAsNonRoot"]), &Value::Bool(true), "{name}");
            assert_eq!(text(pod, &["securityContext", "seccompProfile", "type"]), "RuntimeDefault", "{name}");
            for container in containers(pod) {
                let title = format!("{name}: {}", text(container, &["name"]));
                for bound in ["requests", "limits"] {
                    for resource in ["cpu", "memory"] {
                        assert!(
                            !at(container, &["resources", bound, resource]).is_null(),
                            "{title}: {bound} {resource}"
                        );
                    }
                }
                let security = at(container, &["securityContext"]);
                assert_eq!(at(security, &["allowPrivilegeEscalation"]), &Value::Bool(false), "{title}");
                assert_eq!(at(security, &["readOnlyRootFilesystem"]), &Value::Bool(true), "{title}");
                assert_eq!(strings(at(security, &["capabilities", "drop"])), ["ALL"], "{title}");
            }
        }
    }
}

#[test]
fn every_server_has_probes_a_budget_and_keeps_apart() {
    for (name, settings) in SETTINGS {
        let Some(objects) = rendered(settings) else {
            return;
        };
        let budgets: Vec<_> = of_kind(&objects, "PodDisruptionBudget").collect();
        for deployment in of_kind(&objects, "Deployment") {
            let selector = at(deployment, &["spec", "selector"]);
            assert!(budgets.iter().any(|budget| at(budget, &["spec", "selector"]) == selector), "{name}");
            let pod = at(deployment, &["spec", "template", "spec"]);
            assert!(!at(pod, &["affinity", "podAntiAffinity"]).is_null(), "{name}");
            for container in containers(pod) {
                for (probe, path) in [("livenessProbe", "/healthz"), ("readinessProbe", "/readyz")] {
                    assert_eq!(text(container, &[probe, "httpGet", "path"]), path, "{name}");
                }
            }
        }
    }
}

#[test]
fn every_object_is_labelled_and_has_its_namespace() {
    const CLUSTER_SCOPED: [&str; 3] = ["CustomResourceDefinition", "ClusterRole", "ClusterRoleBinding"];
    for (name, settings) in SETTINGS {
        let Some(objects) = rendered(settings) else {
            return;
        };
        for object in &objects {
            let title = format!("{name}: {} {}", text(object, &["kind"]), text(object, &["metadata", "name"]));
            let scoped = CLUSTER_SCOPED.contains(&text(object, &["kind"]));
            assert_eq!(text(object, &["metadata", "namespace"]).is_empty(), scoped, "{title}");
            if text(object, &["kind"]) != "CustomResourceDefinition" {
                for label in ["name", "instance", "version", "component", "part-of", "managed-by"] {
                    let label = format!("app.kubernetes.io/{label}");
                    assert!(!text(object, &["metadata", "labels", &label]).is_empty(), "{title}: {label}");
                }
            }
        }
    }
}

#[test]
fn the_operator_has_these_rights_and_no_others() {
    for (name, settings) in SETTINGS {
        let Some(objects) = rendered(settings) else {
            return;
        };
        let namespaces: Vec<_> = settings.iter().filter(|setting| setting.starts_with("watchNamespaces")).collect();
        let kind = if namespaces.is_empty() { "ClusterRole" } else { "Role" };
        let nodes = |role: &&Value| text(role, &["metadata", "name"]).starts_with("modelfleet-operator-nodes-");
        let named = |role: &&Value| text(role, &["metadata", "name"]) != "modelfleet-operator-home";
        let roles: Vec<_> = of_kind(&objects, kind).filter(|role| named(role) && !nodes(role)).collect();
        assert!(!roles.is_empty(), "{name}");
        for role in roles {
            let mut expected: BTreeSet<_> = RIGHTS.map(str::to_owned).into();
            expected.insert("events.k8s.io/events: create patch".to_owned());
            expected.insert("policy/poddisruptionbudgets: create delete get list patch watch".to_owned());
            assert_eq!(rights(role), expected, "{name}");
        }
        let home = of_kind(&objects, "Role").find(|role| !named(role)).expect("a Role in its own namespace");
        let expected =
            ["/pods: list watch", "coordination.k8s.io/leases: create", "coordination.k8s.io/leases: get update"];
        assert_eq!(rights(home), expected.map(str::to_owned).into(), "{name}");
        let everywhere = of_kind(&objects, "ClusterRole").find(nodes).expect("nodes are in no namespace");
        assert_eq!(rights(everywhere), ["/nodes: get".to_owned()].into(), "{name}");
    }
}

#[test]
fn roles_are_made_in_the_watched_namespaces_only() {
    let Some(objects) = rendered(&["watchNamespaces={team-a,team-b}"]) else {
        return;
    };
    let roles = of_kind(&objects, "Role").map(|role| text(role, &["metadata", "namespace"]));
    assert_eq!(roles.collect::<BTreeSet<_>>(), ["team-a", "team-b", "modelfleet-system"].into());
    let everywhere = of_kind(&objects, "ClusterRole").map(|role| text(role, &["metadata", "name"]));
    assert_eq!(everywhere.collect::<Vec<_>>(), ["modelfleet-operator-nodes-modelfleet-system"]);
}

#[test]
fn the_definition_is_the_generated_one_and_outlives_the_release() {
    let read = |path: &str| fs::read_to_string(tests::root().join(path)).expect(path);
    let (copy, generated) = (read("charts/modelfleet/files/modeldeployments.yaml"), read("crds/modeldeployments.yaml"));
    assert!(copy == generated, "run: cp crds/modeldeployments.yaml charts/modelfleet/files/");

    let Some(mut objects) = rendered(&[]) else {
        return;
    };
    let crd = objects.iter_mut().find(|object| text(object, &["kind"]) == "CustomResourceDefinition").expect("a CRD");
    let metadata = crd.get_mut("metadata").and_then(Value::as_mapping_mut).expect("metadata");
    let annotations = metadata.remove("annotations").expect("annotations");
    assert_eq!(text(&annotations, &["helm.sh/resource-policy"]), "keep");
    assert_eq!(crd, &objects_of(&generated));
}

fn objects_of(text: &str) -> Value {
    serde_yaml::from_str(text).expect("YAML")
}

#[test]
fn install_yaml_is_the_rendered_chart() {
    if std::env::var_os("HELM").is_none() {
        return;
    }
    let output = Command::new("manifests/render").current_dir(tests::root()).output().expect("manifests/render");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let committed = fs::read(tests::root().join("manifests/install.yaml")).expect("manifests/install.yaml");
    assert!(committed == output.stdout, "run: manifests/render > manifests/install.yaml");
}

#[test]
fn pods_follow_the_images_digest() {
    let digest = "sha256:0000000000000000000000000000000000000000000000000000000000000000";
    let Some(objects) = rendered(&["image.registry=", &format!("image.digest={digest}")]) else {
        return;
    };
    for pod in pods(&objects) {
        for container in containers(pod) {
            let image = text(container, &["image"]);
            assert_eq!(image, format!("modelfleet/modelfleet:{}@{digest}", env!("CARGO_PKG_VERSION")));
        }
    }
}
