//! The hello: who may send which group, decided before anything is received.
//!
//! Order of the questions: version, shape, identity against settings, then the group itself (its owner on
//! disk, its id, its lineage). The identity was proved by TLS; everything else in the hello is a claim.

use std::sync::Arc;

use journal::{GroupId, Lineage};
use wire::Fingerprint;
use wire::message::{ErrorCode, Message, VERSIONS};

use crate::agent::Shared;
use crate::agent::group::{Claim, Group};
use crate::ingest::Refusal;

/// What was agreed.
pub(super) struct Greeting {
    /// Protocol version of the session.
    pub version: u16,
    /// What the peer offers.
    pub features: u64,
    /// The peer's program, for the log.
    pub agent: String,
}

impl Greeting {
    /// Whether the source says which copy it is, and wants to hear of others.
    pub fn tells_copies(&self) -> bool {
        self.features & wire::instance::FEATURE != 0
    }
}

/// Finds or creates the group that the peer may send.
pub(super) async fn greet(
    shared: &Arc<Shared>,
    identity: &Fingerprint,
    hello: Message,
) -> Result<(Arc<Group>, Greeting), Refusal> {
    let Message::Hello { versions, features, group_id, group, lineage, volumes, agent, .. } = hello else {
        return Err(Refusal::new(ErrorCode::BadFrame, "the first message was not a hello"));
    };
    let Some(version) = VERSIONS.into_iter().find(|version| versions.contains(version)) else {
        let what =
            format!("the receiver speaks versions {VERSIONS:?}, the source others: upgrade the older side");
        return Err(Refusal::new(ErrorCode::VersionMismatch, what));
    };
    // The same words for a group that does not exist and one of another identity: nothing is given away.
    if !shared.settings.owns(&identity.0, &group) {
        let what = format!("no [[source]] of this receiver binds group {group:?} to identity {identity}");
        return Err(Refusal::new(ErrorCode::GroupNotYours, what));
    }
    for volume in &volumes {
        if !conf::check_name(&volume.name) {
            let what = format!("volume {:?} has a name that is not 1 to 64 of a-z 0-9 _ -", volume.name);
            return Err(Refusal::new(ErrorCode::NotPossible, what));
        }
    }
    let claim = Claim { name: group, id: GroupId(group_id), owner: identity.0, lineage: Lineage(lineage) };
    let group = shared.group_for(&claim).await?;
    Ok((group, Greeting { version, features, agent }))
}
