//! The CustomResourceDefinition as the API server gets it: the derived schema, put in order, with the rules in place.

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::{CustomResourceDefinition, JSONSchemaProps};
use kube::CustomResourceExt;
use serde_json::{Value, json};

use crate::{ModelDeployment, rules};

/// The CustomResourceDefinition, with the rules of [`crate::rules`] in its schema.
pub fn definition() -> CustomResourceDefinition {
    let mut definition = ModelDeployment::crd();
    for version in &mut definition.spec.versions {
        let Some(props) = version.schema.as_mut().and_then(|s| s.open_api_v3_schema.as_mut()) else {
            continue;
        };
        *props = finished(props);
    }
    definition
}

/// The CustomResourceDefinition as a YAML document, as `crds/modeldeployments.yaml` and `modelfleet crd` print it.
pub fn yaml() -> String {
    serde_yaml::to_string(&definition()).expect("a definition made of JSON values is YAML too")
}

fn finished(derived: &JSONSchemaProps) -> JSONSchemaProps {
    let mut schema = serde_json::to_value(derived).expect("a derived schema is JSON");
    put_in_order(&mut schema);
    without_defaults(&mut schema["properties"]["status"]);
    for (path, rule) in rules::all() {
        let place = find(&mut schema, path);
        let rules = place["x-kubernetes-validations"].take();
        let mut rules = rules.as_array().cloned().unwrap_or_default();
        rules.push(rule);
        place["x-kubernetes-validations"] = json!(rules);
    }
    serde_json::from_value(schema).expect("rules leave the schema a schema")
}

/// An unset field is absent, never null, so that `has` in a rule means what it says.
fn put_in_order(schema: &mut Value) {
    match schema {
        Value::Object(fields) => {
            if fields.get("nullable").is_some_and(Value::is_boolean) {
                fields.remove("nullable");
            }
            fields.values_mut().for_each(put_in_order);
        }
        Value::Array(items) => items.iter_mut().for_each(put_in_order),
        _ => {}
    }
}

/// The operator writes the whole status; the API server must not add to it.
fn without_defaults(schema: &mut Value) {
    if let Value::Object(fields) = schema {
        fields.remove("default");
        for nested in ["properties", "items"] {
            match fields.get_mut(nested) {
                Some(Value::Object(map)) if nested == "properties" => {
                    map.values_mut().for_each(without_defaults);
                }
                Some(items) => without_defaults(items),
                None => {}
            }
        }
    }
}

/// The schema of the field that a path names; `[0]` names every item of a list.
fn find<'a>(schema: &'a mut Value, path: &str) -> &'a mut Value {
    let mut place = schema;
    for part in path.split('.') {
        let name = part.trim_end_matches("[0]");
        place = &mut place["properties"][name];
        if name != part {
            place = &mut place["items"];
        }
    }
    place
}

#[cfg(test)]
mod tests {
    use super::*;

    const COMMITTED: &str = include_str!("../modeldeployments.yaml");

    #[test]
    fn committed_definition_is_the_generated_one() {
        assert!(
            COMMITTED == yaml(),
            "crds/modeldeployments.yaml is out of date; run: cargo run -p crds > crds/modeldeployments.yaml"
        );
    }

    #[test]
    fn definition_stays_under_100_kilobytes() {
        assert!(COMMITTED.len() < 100_000, "{} bytes", COMMITTED.len());
    }

    #[test]
    fn every_rule_stands_at_a_field_that_exists() {
        let mut schema =
            serde_json::to_value(ModelDeployment::crd().spec.versions[0].schema.clone().unwrap().open_api_v3_schema)
                .unwrap();
        for (path, _) in rules::all() {
            let place = find(&mut schema, path);
            assert!(place.get("type").is_some(), "no field at {path}");
        }
    }

    #[test]
    fn every_text_and_list_and_map_of_the_spec_is_bounded() {
        let schema = serde_json::to_value(definition()).unwrap();
        let spec = &schema["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"];
        let mut unbounded = Vec::new();
        collect_unbounded("spec", spec, &mut unbounded);
        assert_eq!(unbounded, Vec::<String>::new());
    }

    fn collect_unbounded(path: &str, schema: &Value, found: &mut Vec<String>) {
        let bound = match schema["type"].as_str() {
            Some("string") if schema.get("enum").is_none() => "maxLength",
            Some("array") => "maxItems",
            Some("object") if schema.get("additionalProperties").is_some() => "maxProperties",
            _ => "",
        };
        if !bound.is_empty() && schema.get(bound).is_none() {
            found.push(format!("{path} has no {bound}"));
        }
        for (name, field) in schema["properties"].as_object().into_iter().flatten() {
            collect_unbounded(&format!("{path}.{name}"), field, found);
        }
        for nested in ["items", "additionalProperties"] {
            if let Some(field) = schema.get(nested) {
                collect_unbounded(&format!("{path}[]"), field, found);
            }
        }
    }

    #[test]
    fn columns_are_the_ones_that_people_read() {
        let version = &definition().spec.versions[0];
        let columns = version.additional_printer_columns.iter().flatten();
        let names: Vec<&str> = columns.map(|column| column.name.as_str()).collect();
        assert_eq!(names, ["Model", "Ready", "Shards", "Experts", "Status", "Age"]);
    }
}
