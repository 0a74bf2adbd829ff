//! Generates the protocols, without a system `protoc`.

use std::{env, error::Error, path::PathBuf};

use prost::Message as _;

fn main() -> Result<(), Box<dyn Error>> {
    const FILES: [&str; 4] = ["inference", "worker", "experts", "fleet"];
    let paths: Vec<String> = FILES.iter().map(|file| format!("proto/modelfleet/v1/{file}.proto")).collect();
    for path in &paths {
        println!("cargo:rerun-if-changed={path}");
    }
    let descriptors = protox::compile(&paths, ["proto"])?;
    let out = PathBuf::from(env::var("OUT_DIR")?);
    std::fs::write(out.join("modelfleet.bin"), descriptors.encode_to_vec())?;
    let inference = protox::compile([&paths[0]], ["proto"])?;
    std::fs::write(out.join("inference.bin"), inference.encode_to_vec())?;
    let mut generated = tonic_prost_build::configure().bytes(".modelfleet.v1");
    for told_as_json in ["ExpertLoad", "LayerLoad"] {
        let path = format!(".modelfleet.v1.{told_as_json}");
        generated = generated.type_attribute(path, "#[derive(serde::Serialize, serde::Deserialize)]");
    }
    generated.compile_fds(descriptors)?;
    Ok(())
}
