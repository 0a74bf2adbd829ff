//! Prints the CustomResourceDefinition: `cargo run -p crds > crds/modeldeployments.yaml`.

fn main() {
    print!("{}", crds::yaml());
}
