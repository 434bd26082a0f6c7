import ApertusKit
import SwiftUI

/// The conversation, what the model takes of the memory, and where to type.
struct ChatView: View {
    let chat: ChatModel
    @State private var question = ""
    @State private var picksModel = false

    var body: some View {
        VStack(spacing: 0) {
            conversation
            StatusLine(chat: chat)
            input
        }
        .navigationTitle(chat.folder?.lastPathComponent ?? "Apertus")
        .toolbar { menu }
        .sheet(isPresented: $picksModel) {
            ModelPicker(chat: chat)
        }
    }

    private var conversation: some View {
        ScrollViewReader { reader in
            ScrollView {
                LazyVStack(alignment: .leading, spacing: 12) {
                    ForEach(chat.lines) { line in
                        LineView(line: line).id(line.id)
                    }
                }
                .padding()
            }
            .onChange(of: chat.lines.last?.text) {
                if let last = chat.lines.last { reader.scrollTo(last.id, anchor: .bottom) }
            }
        }
        .overlay {
            if case .failed(let reason) = chat.state {
                ContentUnavailableView(
                    "The model was not loaded", systemImage: "exclamationmark.triangle",
                    description: Text(reason))
            } else if chat.state == .noModel {
                ContentUnavailableView(
                    "No model", systemImage: "tray",
                    description: Text("Put a converted folder into this app's documents."))
            }
        }
    }

    private var input: some View {
        HStack {
            TextField("Message", text: $question, axis: .vertical)
                .textFieldStyle(.roundedBorder)
                .lineLimit(1 ... 5)
                .onSubmit(send)
            if chat.state == .answering {
                Button("Stop", systemImage: "stop.circle.fill", action: chat.stop)
            } else {
                Button("Send", systemImage: "arrow.up.circle.fill", action: send)
                    .disabled(!chat.canAsk || question.isEmpty)
            }
        }
        .labelStyle(.iconOnly)
        .font(.title2)
        .padding()
    }

    private var menu: some View {
        Menu("More", systemImage: "ellipsis.circle") {
            Toggle(
                "Deliberate first",
                isOn: Binding(get: { chat.thinks }, set: { chat.thinks = $0 }))
            Button("New conversation", systemImage: "square.and.pencil", action: chat.restart)
            Button("Self-test", systemImage: "checkmark.seal") {
                Task { await chat.test() }
            }
            Button("Models", systemImage: "shippingbox") { picksModel = true }
        }
        .disabled(chat.state == .answering)
    }

    private func send() {
        let text = question.trimmingCharacters(in: .whitespacesAndNewlines)
        guard chat.canAsk, !text.isEmpty else { return }
        question = ""
        chat.ask(text)
    }
}

/// A question, or an answer with its deliberation folded.
private struct LineView: View {
    let line: ChatLine
    @State private var showsThoughts = false

    var body: some View {
        VStack(alignment: .leading, spacing: 4) {
            if !line.thoughts.isEmpty {
                DisclosureGroup("Deliberation", isExpanded: $showsThoughts) {
                    Text(line.thoughts)
                        .foregroundStyle(.secondary)
                        .frame(maxWidth: .infinity, alignment: .leading)
                }
                .font(.callout)
            }
            Text(line.text)
                .textSelection(.enabled)
                .frame(maxWidth: .infinity, alignment: line.speaker == .user ? .trailing : .leading)
        }
        .padding(10)
        .background(
            line.speaker == .user ? Color.accentColor.opacity(0.15) : Color.secondary.opacity(0.1),
            in: .rect(cornerRadius: 12))
    }
}

/// What is going on, and the memory: in use, the peak, and what the model may take.
private struct StatusLine: View {
    let chat: ChatModel

    var body: some View {
        VStack(alignment: .leading, spacing: 2) {
            switch chat.state {
            case .loading(let share): ProgressView("Loading", value: share)
            case .testing(let share): ProgressView("Testing", value: share)
            default: if !chat.note.isEmpty { Text(chat.note) }
            }
            if let memory = chat.memory {
                Text(
                    "Memory \(size(memory.active)), peak \(size(memory.peak)), planned "
                        + "\(size(memory.planned)) of \(size(memory.limit))"
                )
                .monospacedDigit()
            }
        }
        .font(.caption)
        .foregroundStyle(.secondary)
        .frame(maxWidth: .infinity, alignment: .leading)
        .padding(.horizontal)
    }

    private func size(_ bytes: Int) -> String {
        Int64(bytes).formatted(.byteCount(style: .memory))
    }
}
