import SwiftUI

#if os(iOS) || os(visionOS)
    import UIKit
#endif

/// Leaves the GPU alone while the app is in the background.
///
/// There, work on the GPU ends the process, and nothing can catch that. So the answer is stopped as
/// soon as the app is no longer active, and the system is asked for time until the last token is
/// done.
@MainActor
enum Lifecycle {
    static func changed(to phase: ScenePhase, _ chat: ChatModel) {
        chat.isActive = phase == .active
        guard phase != .active else { return }
        #if os(iOS) || os(visionOS)
            var task = UIBackgroundTaskIdentifier.invalid
            task = UIApplication.shared.beginBackgroundTask {
                UIApplication.shared.endBackgroundTask(task)
            }
            Task {
                await chat.stopAndWait()
                UIApplication.shared.endBackgroundTask(task)
            }
        #endif
    }
}
