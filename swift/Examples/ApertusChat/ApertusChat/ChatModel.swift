import ApertusKit
import Foundation
import Observation

/// One line of the conversation, as it is shown.
struct ChatLine: Identifiable {
    enum Speaker { case user, model }

    let id = UUID()
    let speaker: Speaker
    var text = ""
    var thoughts = ""
}

/// The model, the conversation, and what the screen shows of both.
@MainActor
@Observable
final class ChatModel {
    enum State: Equatable {
        case noModel
        case loading(Double)
        case ready
        case answering
        case testing(Double)
        case failed(String)
    }

    private(set) var state = State.noModel
    private(set) var lines: [ChatLine] = []
    private(set) var folder: URL?
    private(set) var memory: MemoryUse?
    /// What the last answer or the self-test came to, for the line at the bottom.
    private(set) var note = ""
    var thinks = false { didSet { conversation?.thinks = thinks } }
    /// Whether the app may use the GPU.
    var isActive = true

    private var apertus: Apertus?
    private var conversation: Conversation?
    private var answering: Task<Void, Never>?

    var canAsk: Bool { state == .ready && isActive }

    /// Load the first model there is.
    func loadFirst() async {
        guard apertus == nil, let first = ModelFolders.all().first else { return }
        await load(first)
    }

    func load(_ folder: URL) async {
        await stopAndWait()
        // The memory of the one has to be free before the other is planned.
        (apertus, conversation, lines, memory) = (nil, nil, [], nil)
        self.folder = folder
        state = .loading(0)
        do {
            let loaded = try await Apertus(folder: folder) { share in
                Task { @MainActor [weak self] in
                    if case .loading = self?.state { self?.state = .loading(share) }
                }
            }
            apertus = loaded
            restart()
            state = .ready
        } catch {
            state = .failed("\(error)")
        }
    }

    /// Begin the conversation anew.
    func restart() {
        conversation = apertus?.conversation(thinks: thinks)
        lines = []
        note = ""
        memory = apertus?.memory
    }

    func ask(_ question: String) {
        guard canAsk, let conversation else { return }
        lines.append(ChatLine(speaker: .user, text: question))
        lines.append(ChatLine(speaker: .model))
        state = .answering
        answering = Task {
            do {
                for try await piece in conversation.ask(question) {
                    show(piece)
                }
            } catch {
                note = "\(error)"
            }
            if let outcome = conversation.lastOutcome {
                note =
                    "\(outcome.tokenIDs.count) tokens, "
                    + outcome.decodeTokensPerSecond.formatted(.number.precision(.fractionLength(1)))
                    + " a second"
            }
            memory = apertus?.memory
            state = .ready
        }
    }

    private func show(_ piece: Piece) {
        guard var line = lines.last else { return }
        line.text += piece.text
        if case .thought(let text) = piece { line.thoughts += text }
        lines[lines.count - 1] = line
        memory = apertus?.memory
    }

    /// End the answer behind the next token; what was said stays.
    func stop() { apertus?.stop() }

    /// The same, and wait until the GPU has nothing to do.
    func stopAndWait() async {
        await apertus?.stopAndWait()
        await answering?.value
    }

    func test() async {
        guard canAsk, let apertus else { return }
        state = .testing(0)
        do {
            let result = try await apertus.selfTest { share in
                Task { @MainActor [weak self] in
                    if case .testing = self?.state { self?.state = .testing(share) }
                }
            }
            if let difference = result.difference {
                note = "Self-test failed. \(difference)"
            } else if result.coversArithmetic {
                note = "Self-test passed: \(result.answerTokens) tokens as computed by apertus-mlx"
            } else {
                note = "Text is right; the folder has no golden answers to test arithmetic with"
            }
        } catch {
            note = "\(error)"
        }
        memory = apertus.memory
        state = .ready
    }
}
