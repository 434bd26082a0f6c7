import SwiftUI

@main
struct ApertusApp: App {
    @State private var chat = ChatModel()
    @Environment(\.scenePhase) private var scenePhase

    var body: some Scene {
        WindowGroup {
            NavigationStack {
                ChatView(chat: chat)
            }
            .task { await chat.loadFirst() }
        }
        .onChange(of: scenePhase) { _, phase in
            Lifecycle.changed(to: phase, chat)
        }
    }
}
