//! What stands around our programs in the benchmarks.
//!
//! `stand-ins upstream PORT` answers chats at once, as plain HTTP and as workers; `stand-ins pods API OPERATOR` does what
//! the processes in pods would say to the operator.

mod pods;
mod upstream;

use anyhow::bail;

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments.as_slice() {
        ["upstream", port] => upstream::serve(port.parse()?).await,
        ["pods", api, operator] => pods::run(api, operator).await,
        _ => bail!("usage: stand-ins upstream PORT | stand-ins pods API OPERATOR"),
    }
}
