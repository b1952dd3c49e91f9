//! A volume through the library, without NBD: the cases of the matrix in a closed loop in this process.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use cairn_chaos::live::fio::Figures;
use cairn_client::config::Config;
use cairn_client::{Client, Volume};
use cairn_proto::limits::BLOCK_BYTES;
use tokio::runtime::{Builder, Runtime};
use tokio::task::JoinSet;

use crate::store::content::Content;
use crate::store::work::{self, Load, Stop, Target, Work};

/// How often it is read from before anything is measured: each group is attached when it is first used.
const TOUCH_EVERY: u64 = 64 << 20;
/// How long an operation of 4 KiB may take while nothing is measured.
const TOUCH_BOUND: Duration = Duration::from_secs(60);

/// A volume that this process has opened.
#[derive(Debug)]
pub struct Library {
    // In this order: the volume is given back before the runtime that speaks to the metadata servers ends.
    volume: Arc<Volume>,
    load: Runtime,
    _metas: Runtime,
}

impl Library {
    /// Opens a volume of the cluster that this configuration file tells of.
    pub fn open(config: &Path, name: &str) -> Result<Library, String> {
        let config = Config::load(config).map_err(|error| error.to_string())?;
        let words = |error: std::io::Error| format!("no runtime for the library: {error}");
        // A thread that speaks to the metadata servers also while no load runs; the load has the thread of whoever measures.
        let metas = Builder::new_multi_thread().worker_threads(1).enable_all().build();
        let metas = metas.map_err(words)?;
        let load = Builder::new_current_thread().build().map_err(words)?;
        let volume = metas.block_on(async {
            let client = Client::start(config.cluster.meta, "bench").await;
            let client = client.map_err(|error| error.to_string())?;
            client.open(name).await.map_err(|error| error.to_string())
        })?;
        Ok(Library {
            volume: Arc::new(volume),
            load,
            _metas: metas,
        })
    }

    /// Takes the attachment of all of it, from whoever has it.
    pub fn attach(&self) -> Result<(), String> {
        let size = self.volume.size().0;
        self._metas.block_on(async {
            for offset in (0..size).step_by(TOUCH_EVERY as usize) {
                let read = self.volume.read(offset, BLOCK_BYTES as u32);
                let read = tokio::time::timeout(TOUCH_BOUND, read).await;
                let read = read.map_err(|_| format!("a read at {offset} took more than {TOUCH_BOUND:?}"))?;
                read.map_err(|error| format!("a read at {offset}: {error}"))?;
            }
            Ok(())
        })
    }

    /// Runs one case for so long; `seed` chooses the places. An I/O error ends it.
    pub fn run(&self, load: &Load, seed: u64) -> Result<Figures, String> {
        let mut target = Driving {
            library: self,
            operations: JoinSet::new(),
            content: Content::new(),
        };
        let found = work::run(&mut target, load, seed)?;
        Ok(Figures {
            iops: found.iops,
            bytes_per_s: found.bytes_per_s,
            mean_us: found.mean_us,
            p50_us: found.p50_us,
            p99_us: found.p99_us,
            p999_us: found.p999_us,
            max_us: found.max_us,
            ios: found.ops,
        })
    }
}

/// A load of this kind over all of so many bytes.
pub fn load(write: bool, random: bool, bytes: u32, depth: usize, span_bytes: u64, time: Duration) -> Load {
    Load {
        write,
        random,
        blocks: bytes / BLOCK_BYTES as u32,
        depth,
        span: span_bytes / BLOCK_BYTES as u64,
        stop: Stop::After(time),
    }
}

/// The operations of one load.
struct Driving<'a> {
    library: &'a Library,
    operations: JoinSet<(usize, Result<(), String>)>,
    content: Content,
}

impl Target for Driving<'_> {
    fn submit(&mut self, id: usize, work: Work) {
        let volume = self.library.volume.clone();
        let offset = work.block * BLOCK_BYTES as u64;
        let length = work.blocks * BLOCK_BYTES as u32;
        let data = work.write.then(|| self.content.next(work.blocks));
        let operation = async move {
            let result = match data {
                Some(data) => volume.write(offset, data).await,
                None => volume.read(offset, length).await.map(drop),
            };
            let words = |error| format!("{length} bytes at {offset}: {error}");
            (id, result.map_err(words))
        };
        self.operations.spawn_on(operation, self.library.load.handle());
    }

    fn wait(&mut self, done: &mut Vec<usize>) -> Result<(), String> {
        let operations = &mut self.operations;
        self.library.load.block_on(async {
            let mut next = operations.join_next().await;
            while let Some(ended) = next {
                let (id, result) = ended.map_err(|error| format!("an operation: {error}"))?;
                result?;
                done.push(id);
                next = operations.try_join_next();
            }
            Ok(())
        })
    }

    fn device_bytes(&self) -> u64 {
        0
    }
}
